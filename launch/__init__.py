"""How Braid is started: the command line, local ranks and the shipped recipes."""
