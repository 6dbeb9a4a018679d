"""One self-contained page about runs: `braid report`."""
