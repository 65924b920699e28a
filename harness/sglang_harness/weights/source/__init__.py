"""Where pushed weights come from: a checkpoint or a model, fitted and written for a route."""
