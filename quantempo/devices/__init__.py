"""What depends on the machine: opening a bundle there, choosing and comparing its engines, judging their speed."""
