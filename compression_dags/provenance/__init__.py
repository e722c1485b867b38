"""Where everything came from: fingerprints, artifacts, decisions, model cards, reports."""
