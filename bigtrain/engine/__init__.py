"""How a run is distributed: DeepSpeed ZeRO, and Accelerate as the reference it is held to.

`start` joins the ranks and builds an engine. Nothing is imported here: the command line reads `deepspeed_schema`
without torch.
"""
