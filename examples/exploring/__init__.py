"""What `explore.py` is made of: pictures, what is shown of a model, and the page."""
