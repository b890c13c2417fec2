"""A CUDA device simulated on a CPU build of torch, so that tests of what a GPU would do need none.

Tensors say ``cuda:0`` and hold their numbers in CPU memory. So whole training runs work, ``.item()`` and ``if tensor:``
included, which ``FakeTensorMode`` cannot follow. On the way

* every operation checks that its tensors and generators are on one device, by CUDA's rules;
* everything at which the host of a real GPU waits is recorded with its line, or refused
  (``torch.cuda.set_sync_debug_mode("error")``);
* every operation that a GPU would launch a kernel for is counted.

Where to read on:

* ``install.py`` makes torch believe that there is a device, and says where that is not possible;
* ``tensor.py`` is the tensor on that device;
* ``operations.py`` runs each operation on the tensors inside, once it has been checked and counted;
* ``rules.py`` is what is known of CUDA: who may meet whom, what waits, what launches nothing;
* ``record.py`` counts.

Not simulated: failures of kernels themselves, their numerics and races, streams, several GPUs, ``torch.compile``,
forward-mode derivatives. The list of operations that wait was made by hand (``rules.WAITS``).
"""
