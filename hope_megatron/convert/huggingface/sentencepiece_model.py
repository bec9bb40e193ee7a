"""SentencePiece's own message, through which a tokenizer model is read and changed."""

from __future__ import annotations

from typing import Any

from hope_megatron.checkpoint.errors import ConversionError


def model_proto(model: bytes = b"") -> Any:
    """A `sentencepiece.ModelProto` with the content of tokenizer.model; an empty one without.

    Raises:
        ConversionError: the installed protobuf is older than the one that sentencepiece was made with (0.2.3: 7.36.1).
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # protobuf's VersionError is no ImportError
        if type(error).__name__ != "VersionError":
            raise
        raise ConversionError(
            f"sentencepiece cannot use the protobuf that is installed ({str(error).split('. ')[0]}); "
            "pip install 'protobuf>=7.36.1', or 'sentencepiece<0.2.3' where protobuf has to stay"
        ) from None
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return proto
