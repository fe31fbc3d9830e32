"""The definition in numpy: slow, exact, and what every native kernel must equal."""
