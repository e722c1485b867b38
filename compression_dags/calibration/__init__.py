"""Calibration: corpora, token blocks, and one streamed pass through the decoder with accumulators."""
