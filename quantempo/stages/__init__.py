"""The stages of a compile; `quantempo.pipeline` runs them in order."""
