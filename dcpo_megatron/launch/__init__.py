"""Starting the ranks of a run, on this host or on several, and passing signals on to them."""
