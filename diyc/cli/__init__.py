"""The command line: diyc-supervisor, diyc, and what they print while runs are going on and after them."""
