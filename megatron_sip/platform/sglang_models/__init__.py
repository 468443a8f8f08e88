"""What SGLang's setting SGLANG_EXTERNAL_MODEL_PACKAGE names: models that it finds without importing all that it knows."""
