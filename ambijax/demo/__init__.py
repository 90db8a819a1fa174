"""A local page to record or drop a clip and see how people would hear it; `python -m ambijax.demo --model runs/tiny`"""
