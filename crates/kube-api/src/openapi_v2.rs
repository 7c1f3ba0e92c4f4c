//! `GET /openapi/v2`: an OpenAPI document of version 2 without definitions.
//!
//! kubectl asks for it, and gives up without it, when it validates a `v1` List: it takes the check of
//! the List on itself, and leaves those objects to the server whose definition the document lacks
//! (`k8s.io/kubectl/pkg/validation`). The server checks them better: with every rule, and with the
//! field that was probably meant. All schemas are in version 3, under `/openapi/v3`.

use axum::body::Body;
use http::{HeaderMap, HeaderValue, Response, header};
use serde_json::json;

use crate::service::respond;

const PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
const TITLE: &str = "Krake";
/// Of the document; it never changes.
const VERSION: &str = "v1";

/// The document as the client takes it: kubectl only as protobuf.
pub(crate) fn answer(headers: &HeaderMap) -> Response<Body> {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    if !accept.contains("proto-openapi.spec.v2") {
        return respond(
            200,
            &json!({"swagger": "2.0", "info": {"title": TITLE, "version": VERSION}, "paths": {}, "definitions": {}}),
        );
    }
    let mut response = Response::new(Body::from(document()));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(PROTOBUF));
    response
}

/// The message `openapi.v2.Document` (github.com/google/gnostic-models, `openapiv2/OpenAPIv2.proto`):
/// 1 `swagger`, 2 `info` (1 `title`, 2 `version`), 8 `paths`, 9 `definitions`.
fn document() -> Vec<u8> {
    let info = [text(1, TITLE), text(2, VERSION)].concat();
    [
        text(1, "2.0"),
        field(2, &info),
        field(8, &[]),
        field(9, &[]),
    ]
    .concat()
}

fn text(number: u8, text: &str) -> Vec<u8> {
    field(number, text.as_bytes())
}

/// A field with a length: number and length are one byte each, as long as they are small.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    /// Wire type of what carries its length.
    const WITH_LENGTH: u8 = 2;
    let length = u8::try_from(content.len()).ok().filter(|n| *n < 0x80);
    let length = length.expect("the document's texts are shorter than 128 bytes");
    let mut bytes = vec![number << 3 | WITH_LENGTH, length];
    bytes.extend_from_slice(content);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_the_message_that_kubectl_reads() {
        // As `protoc --encode=openapi.v2.Document` writes it.
        let wanted = b"\x0a\x032.0\x12\x0b\x0a\x05Krake\x12\x02v1\x42\x00\x4a\x00";
        assert_eq!(document(), wanted);
    }
}
