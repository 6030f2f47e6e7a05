"""Every setting of a run, and where its value comes from: flags, a file, a recipe, defaults."""
