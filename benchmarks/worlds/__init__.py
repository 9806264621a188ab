"""Generated worlds: the corpus of four domains, and the recipe that makes a target and its drafters from it."""
