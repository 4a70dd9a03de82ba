"""How mini-coder is made: its data, its training, and the experiment with its twins. Not part of the library."""
