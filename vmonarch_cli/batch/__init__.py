"""Many clips from a file of prompts: parsed and checked as a whole, made one by one, and resumed after anything."""
