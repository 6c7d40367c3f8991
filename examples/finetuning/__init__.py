"""The parts of `finetune.py`: data, the small model of the demo, training arms, measurements and the report."""
