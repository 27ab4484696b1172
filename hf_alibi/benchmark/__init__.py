"""Time, memory and error of attention, models and generation beside their peers."""
