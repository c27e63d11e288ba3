"""The disposable processes: how an agent forks, watches and kills them, and the messages between both."""
