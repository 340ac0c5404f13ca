"""Small pure helpers that every floor may use: schedules, seeds, files, weight loading."""
