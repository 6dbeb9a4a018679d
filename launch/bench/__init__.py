"""Speed beside the peers that are installed: one file per benchmark in `rows/`, measured side by side."""
