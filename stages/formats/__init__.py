"""Other people's file formats: the way in and out of the pipeline's own."""
