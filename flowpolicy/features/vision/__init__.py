"""Image encoders: pictures to tokens that the action tokens attend to."""
