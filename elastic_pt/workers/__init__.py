"""The disposable processes: how an agent forks, watches and kills them, and how both sides talk."""
