//! URLs of other databases on the same server.

use crate::kind::DatabaseKind;
use crate::percent::encode;
use crate::redact::is_harmless;
use crate::url::{Target, is_url};

/// The URL of `target` with the name of another database.
///
/// # Errors
/// The reason, if the URL names its database in a way that overrides the new name.
pub(super) fn with_database(target: &Target, database: &str) -> Result<String, String> {
    let url = &target.url;
    if target.kind == DatabaseKind::Postgres && !is_url(url) {
        // If a keyword occurs twice, libpq uses the last value.
        return Ok(target.with_parameters(&[("dbname", database.to_owned())]));
    }
    if target.kind == DatabaseKind::Postgres && target.has_parameter("dbname") {
        return Err("the URL names its database by the parameter `dbname`; write it as the URL's path".into());
    }
    let (before, query) = match url.split_once('?') {
        Some((before, query)) => (before, format!("?{query}")),
        None => (url.as_str(), String::new()),
    };
    let authority = before.find("://").map_or(0, |at| at + 3);
    let end = before[authority..].find('/').map_or(before.len(), |at| authority + at);
    Ok(format!("{}/{}{query}", &before[..end], encode(database)))
}

/// The URL of `target` for sessions whose `search_path` is only `schema`. The path is a parameter of the connection, so
/// `RESET ALL` restores it.
///
/// # Errors
/// The reason, if the URL already has the parameter `options`.
pub(super) fn with_schema(target: &Target, schema: &str) -> Result<String, String> {
    if target.has_parameter("options") {
        return Err("the URL has a parameter `options`, which a schema of its own needs for itself; \
             use `Config::on_connect` for the settings"
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
    fn with_database_replaces_only_the_database() {
        let with = |url| with_database(&target(url), "a b\"c").expect(url);
        assert_eq!(with("postgres://u:p@h:1/db?x=y"), "postgres://u:p@h:1/a%20b%22c?x=y");
        assert_eq!(with("postgres://u:p@/db?host=%2Ftmp"), "postgres://u:p@/a%20b%22c?host=%2Ftmp");
        assert_eq!(with("postgres://h"), "postgres://h/a%20b%22c");
        assert_eq!(with("mysql://u:p@h/db"), "mysql://u:p@h/a%20b%22c");
        assert_eq!(with("host=h dbname=db"), "host=h dbname=db dbname='a b\"c'");
        assert_eq!(with("host=h application_name='a://b'"), "host=h application_name='a://b' dbname='a b\"c'");
        assert!(with_database(&target("postgres://h/?dbname=x"), "y").is_err());
        for url in ["postgres://u:p@h:1/db?x=y", "host=h dbname=db", "mysql://u:p@h/db"] {
            assert_eq!(target(&with(url)).database, "a b\"c", "{url}");
        }
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
