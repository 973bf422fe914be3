"""The model: loaded (`load`), with adapters (`lora`), with the loss in its own head (`head`), packed exactly
(`recurrent`).
"""
