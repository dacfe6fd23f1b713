"""Side by side with peers: scripts, whose tables of recipes the tests read."""
