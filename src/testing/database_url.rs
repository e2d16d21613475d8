//! URLs of schemas, and URLs without passwords.

use crate::kind::DatabaseKind;
use crate::redact::is_harmless;
use crate::url::{Target, is_url};

/// The URL of `target` for sessions whose `search_path` is only `schema`. The path is a parameter of the connection, so
/// `RESET ALL` restores it.
///
/// # Errors
/// The reason, if the URL already has the parameter `options`.
pub(super) fn with_schema(target: &Target, schema: &str) -> Result<String, String> {
    if target.has_parameter("options") {
        return Err("the URL has a parameter `options`, which a schema of its own needs for itself; \
             use `Config::connection_init_sql` for the settings"
            .into());
    }
    Ok(target.with_parameters(&[("options", format!("-c search_path={schema}"))]))
}

/// The URL of `target` without its password and without parameters that may contain a secret.
pub(super) fn without_password(target: &Target) -> String {
    let url = &target.url;
    if target.kind == DatabaseKind::Postgres && !is_url(url) {
        return target.shown.clone();
    }
    let at = url.find("://").map_or(0, |at| at + 3);
    let end = url[at..].find(['/', '?']).map_or(url.len(), |end| at + end);
    let bare = match url[at..end].rsplit_once('@') {
        Some((credentials, host)) => format!("{}@{host}", credentials.split(':').next().unwrap_or_default()),
        None => url[at..end].to_owned(),
    };
    let (path, query) = url[end..].split_once('?').unwrap_or((&url[end..], ""));
    let harmless = query.split('&').filter(|pair| is_harmless(pair.split('=').next().unwrap_or_default()));
    let query: Vec<&str> = harmless.collect();
    let mark = if query.is_empty() { "" } else { "?" };
    format!("{}{bare}{path}{mark}{}", &url[..at], query.join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(url: &str) -> Target {
        Target::parse(url, None).expect(url)
    }

    #[test]
    fn without_password_removes_every_secret() {
        let shown = |url| without_password(&target(url));
        assert_eq!(shown("postgres://u:sec%40ret@h:1/db?x=y&sslmode=require"), "postgres://u@h:1/db?sslmode=require");
        assert_eq!(shown("postgres://u@h/db?password=abc&host=%2Ftmp"), "postgres://u@h/db?host=%2Ftmp");
        assert!(!shown("host=h password=abc dbname=x").contains("abc"));
        assert_eq!(shown("mysql://u:secret@h/db"), "mysql://u@h/db");
        assert_eq!(shown("shop.sqlite"), "shop.sqlite");
        assert_eq!(shown("file:/srv/shop?mode=ro&key=abc"), "file:/srv/shop?mode=ro");
        assert!(!shown("host=h password=secret1 dbname=x").contains("secret1"));
    }
}
