"""The vision-language model as pure functions."""
