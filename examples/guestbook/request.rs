//! A request with its complete body.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http;

/// A request with its body, or with the reason why the body is missing.
pub(crate) type Request = http::Request<Result<Bytes, BytesRejection>>;

/// Maximum size of a body.
pub(crate) const BODY_BYTES: usize = 64 * 1024;
