"""The model zoo: targets and networks that come ready to sample.

============================ =================================================================================
``bnn_ppl.models.densities`` Target densities with known moments, for ``potential_fn=``, in any array library.
``bnn_ppl.models.conjugate`` Exact posteriors in NumPy, to hold a sampler against.
``bnn_ppl.models.checks``    What the models accept: activations, sizes, shapes.
``bnn_ppl.models.numpyro``   linear_regression, logistic_regression, mlp_regression, mlp_classification, and
                             from flax modules (``pip install 'bnn_ppl[models]'``) lenet5, vgg, resnet20.
``bnn_ppl.models.pyro``      The same models, with the same arguments.
============================ =================================================================================

Importing this package loads neither torch nor jax.
"""
