//! Percent-encoding of URLs.

/// Decodes `text`. `None` if `text` is malformed, decodes to invalid UTF-8, or contains an encoded NUL.
pub(crate) fn decode(text: &str) -> Option<String> {
    let is_valid = |code: &str| byte_of(code).is_some_and(|byte| byte != 0);
    if text.split('%').skip(1).all(is_valid) { String::from_utf8(decode_bytes(text)).ok() } else { None }
}

/// Decodes `text`. A malformed code stays as it is.
pub(crate) fn decode_bytes(text: &str) -> Vec<u8> {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match byte_of(part) {
            Some(byte) => bytes.extend([&[byte], &part.as_bytes()[2..]].concat()),
            None => bytes.extend([b"%", part.as_bytes()].concat()),
        }
    }
    bytes
}

/// The byte whose two hexadecimal digits `text` starts with.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.get(..2)?;
    if digits.starts_with('+') { None } else { u8::from_str_radix(digits, 16).ok() }
}

/// Encodes every character of `text` except letters, digits and `-_.~/`.
pub(crate) fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => encoded.push(byte as char),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}
