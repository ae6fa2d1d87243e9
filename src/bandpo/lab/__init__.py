"""Small models on procedurally generated tasks, to see on a laptop what each choice does."""
