"""`bandpo train` and `bandpo evaluate`: from one configuration file to a trained model, its table, plots and report."""
