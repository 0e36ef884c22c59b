"""A proxy in front of any server that takes and gives token ids: the OpenAI API in threads (extra ``proxy``)."""
