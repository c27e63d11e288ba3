"""Who trains: what nodes tell each other, the pure decision, and the thread that carries it out."""
