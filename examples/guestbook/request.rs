//! A request that has come whole.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http;

/// With its body, or with why that is not there.
pub(crate) type Request = http::Request<Result<Bytes, BytesRejection>>;

/// What a body may have.
pub(crate) const BODY_BYTES: usize = 64 * 1024;
