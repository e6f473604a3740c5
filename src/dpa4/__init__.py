"""DPA4 interatomic potentials: data, graphs, the model, potentials, training, simulation."""

__version__ = "0.1.0"
