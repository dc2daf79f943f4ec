"""AlexNet (Krizhevsky, Sutskever, Hinton 2012), trained on one machine or a cluster."""

__version__ = "0.2.0"
