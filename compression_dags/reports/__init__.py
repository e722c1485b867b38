"""Scorecards, leaderboard, HTML report, model card, and the story of one layer."""
