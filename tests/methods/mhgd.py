"""kd_losses/mhgd.py has no vector."""

without_vector = 'TensorFlow 1 only; test_properties.py has a slow second form of it'
exceptions = {
    'equal_channels': 'singular vectors live in channel space',
    'resting': ('', 'the heads learned before'),
    'layers': 'heads',
}
