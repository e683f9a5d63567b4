"""The demo model and its adapter: corpus, recipe and build. Trained by the ordinary trainer on the ordinary path."""
