"""What several tests share: builders of files and models, strategies, oracles, helpers. No tests."""
