"""What runs the compendium: settings, data, trainings, notebooks, grids. The method itself is the package focalcal."""
