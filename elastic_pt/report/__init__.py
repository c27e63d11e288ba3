"""What a run says of itself: read from its directory by anybody, while it trains or long after."""
