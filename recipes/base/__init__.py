"""Recipe of the bundled base: world of images, captions, training stages, judges, export."""
