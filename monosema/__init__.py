"""What lies below everything else here: checks of arguments, and how progress is reported."""
