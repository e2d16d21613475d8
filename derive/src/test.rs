//! `#[diesel_session::test]`: a test with an application of its own.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{Attribute, Error, Expr, FnArg, Ident, ItemFn, LitStr, Path, Result, Token, Type};

const WORDS: &str = "`isolation`, `max_size`, `fixtures(..)`, `fixture`, `config`, `warn_repeats`, `keep` and `template`, each with `=` but for `fixtures`";

/// The isolations that need no path.
const ISOLATIONS: [&str; 3] = ["Database", "Schema", "Rollback"];

/// The arguments of the attribute.
pub(crate) struct Arguments {
    database: Expr,
    /// Calls of the builder, in the order of the arguments.
    calls: Vec<TokenStream>,
}

impl Parse for Arguments {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        if input.is_empty() {
            return Err(input.error("the test needs a database object: `#[diesel_session::test(DB)]`"));
        }
        if input.peek(Ident::peek_any)
            && (input.peek2(Token![=]) && !input.peek2(Token![==])
                || input.peek(fixtures) && input.peek2(syn::token::Paren))
        {
            return Err(input.error("the database object comes first: `#[diesel_session::test(DB, ..)]`"));
        }
        let database = input.parse()?;
        let (mut calls, mut seen) = (Vec::new(), Vec::<Ident>::new());
        while !input.is_empty() {
            input.parse::<Token![,]>()?;
            if input.is_empty() {
                break;
            }
            let word = input.call(Ident::parse_any)?;
            let repeats = word == "fixtures" || word == "fixture";
            if !repeats && seen.contains(&word) {
                return Err(Error::new(word.span(), format!("`{word}` is given twice")));
            }
            calls.extend(read(&word, input)?);
            seen.push(word);
        }
        Ok(Self { database, calls })
    }
}

syn::custom_keyword!(fixtures);

/// Parses the value of one argument. Returns the calls of the builder.
fn read(word: &Ident, input: ParseStream<'_>) -> Result<Vec<TokenStream>> {
    let known = ["isolation", "max_size", "fixtures", "fixture", "config", "warn_repeats", "keep", "template"];
    if !known.iter().any(|known| word == known) {
        return Err(Error::new(word.span(), format!("`{word}` is not known here; there is {WORDS}")));
    }
    if word == "fixtures" {
        if !input.peek(syn::token::Paren) {
            return Err(Error::new(word.span(), "fixtures are files, in brackets: `fixtures(\"users.sql\")`"));
        }
        let content;
        syn::parenthesized!(content in input);
        let files = Punctuated::<LitStr, Token![,]>::parse_terminated(&content)?;
        return Ok(files.iter().map(file).collect());
    }
    if !input.peek(Token![=]) {
        return Err(Error::new(word.span(), format!("`{word}` has a value: `{word} = ..`")));
    }
    input.parse::<Token![=]>()?;
    if word == "fixture" {
        let mistake = "a fixture is the path of a function; several are `fixture = one, fixture = another`";
        let function: Path = input.parse().map_err(|error| Error::new(error.span(), mistake))?;
        let name = text_of(&function);
        return Ok(vec![quote_spanned! {function.span()=>
            .fixture(::diesel_session::testing::Fixture::function(#name, #function))
        }]);
    }
    let value: Expr = input.parse()?;
    let bare = match &value {
        Expr::Path(path) if word == "isolation" && path.qself.is_none() => path.path.get_ident(),
        _ => None,
    };
    let call = match bare {
        Some(name) if ISOLATIONS.iter().any(|isolation| name == isolation) => {
            quote!(.isolation(::diesel_session::testing::TestIsolation::#name))
        }
        _ => quote!(.#word(#value)),
    };
    Ok(vec![call])
}

/// An SQL file. Its path is relative to the source file, as in `include_str!`.
fn file(path: &LitStr) -> TokenStream {
    quote_spanned! {path.span()=>
        .fixture(::diesel_session::testing::Fixture::sql(#path, ::core::include_str!(#path)))
    }
}

/// The segments of a path, without generic arguments.
fn text_of(path: &Path) -> String {
    let segments: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
    segments.join("::")
}

pub(crate) fn expand(arguments: &Arguments, function: &ItemFn) -> Result<TokenStream> {
    check(function)?;
    let Arguments { database, calls } = arguments;
    let ItemFn { attrs, vis, sig, block } = function;
    let (name, output, inputs) = (&sig.ident, &sig.output, &sig.inputs);
    let database = match database {
        Expr::Path(_) => quote!(#database),
        _ => quote!((#database)),
    };
    // The inner function has the name of the test, because any other name could shadow an item that the test uses. The
    // attributes precede `test`, so that a `cfg` is evaluated first. Lint attributes also apply to the inner function.
    let body = if inputs.is_empty() { quote!(|_| #name()) } else { quote!(#name) };
    Ok(quote! {
        #(#attrs)*
        #[::core::prelude::v1::test]
        #vis fn #name() #output {
            fn #name(#inputs) #output #block
            ::diesel_session::testing::run(
                ::diesel_session::testing::TestSetup::of(&#database)
                    .named(::core::concat!(::core::module_path!(), "::", ::core::stringify!(#name)))
                    #(#calls)*,
                #body,
            )
        }
    })
}

fn check(function: &ItemFn) -> Result<()> {
    let sig = &function.sig;
    if let Some(word) = &sig.asyncness {
        return Err(Error::new(word.span(), "a test with a session is synchronous: drop `async`"));
    }
    if let Some(word) = &sig.constness {
        return Err(Error::new(word.span(), "a test is a plain function: drop `const`"));
    }
    if let Some(span) = sig.unsafety.as_ref().map(Spanned::span).or(sig.abi.as_ref().map(Spanned::span)) {
        return Err(Error::new(span, "a test is a plain function: drop `unsafe` and `extern`"));
    }
    if !sig.generics.params.is_empty() || sig.generics.where_clause.is_some() {
        return Err(Error::new_spanned(&sig.generics, "a test has no generic parameters"));
    }
    for input in &sig.inputs {
        if let FnArg::Receiver(receiver) = input {
            return Err(Error::new_spanned(receiver, "a test is a free function: it has no `self`"));
        }
    }
    if let Some(FnArg::Typed(first)) = sig.inputs.first()
        && let Type::Reference(borrowed) = &*first.ty
    {
        return Err(Error::new_spanned(borrowed, "a test takes its application by value: `app: App<C>`"));
    }
    if let Some(second) = sig.inputs.iter().nth(1) {
        return Err(Error::new_spanned(second, "a test has one parameter at most, the application: `app: App<C>`"));
    }
    if let Some(attribute) = function.attrs.iter().find(|attribute| is_test(attribute)) {
        return Err(Error::new_spanned(attribute, "`#[diesel_session::test]` makes it a test: drop the other `test`"));
    }
    Ok(())
}

/// Whether an attribute makes a function a test, in the standard library or in another crate.
fn is_test(attribute: &Attribute) -> bool {
    attribute.path().segments.last().is_some_and(|last| last.ident == "test")
}

#[cfg(test)]
mod tests {
    use quote::quote;
    use syn::{ItemFn, parse_quote, parse2};

    use super::{Arguments, expand};

    fn expanded(arguments: proc_macro2::TokenStream, function: &ItemFn) -> Result<String, String> {
        let arguments: Arguments = parse2(arguments).map_err(|error| error.to_string())?;
        expand(&arguments, function).map(|tokens| tokens.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn expansion_calls_only_the_given_arguments() {
        let function = parse_quote! {
            /// It works.
            #[should_panic]
            #[allow(unused)]
            pub(crate) fn works(app: App<C>) -> Result<(), Error> { Ok(()) }
        };
        let expected = quote! {
            /// It works.
            #[should_panic]
            #[allow(unused)]
            #[::core::prelude::v1::test]
            pub(crate) fn works() -> Result<(), Error> {
                fn works(app: App<C>) -> Result<(), Error> { Ok(()) }
                ::diesel_session::testing::run(
                    ::diesel_session::testing::TestSetup::of(&crate::DB)
                        .named(::core::concat!(::core::module_path!(), "::", ::core::stringify!(works))),
                    works,
                )
            }
        };
        assert_eq!(expanded(quote!(crate::DB), &function), Ok(expected.to_string()));
    }

    #[test]
    fn expansion_calls_the_builder_for_every_argument() {
        let function = parse_quote!(
            fn works() {}
        );
        let arguments = quote! {
            DB, isolation = Rollback, max_size = 2, fixtures("a.sql", "b.sql"), fixture = some::rows, config = Config::new("x"),
            fixtures("c.sql"), warn_repeats = 10, keep = true, template = "base",
        };
        let calls = quote! {
            .isolation(::diesel_session::testing::TestIsolation::Rollback)
            .max_size(2)
            .fixture(::diesel_session::testing::Fixture::sql("a.sql", ::core::include_str!("a.sql")))
            .fixture(::diesel_session::testing::Fixture::sql("b.sql", ::core::include_str!("b.sql")))
            .fixture(::diesel_session::testing::Fixture::function("some::rows", some::rows))
            .config(Config::new("x"))
            .fixture(::diesel_session::testing::Fixture::sql("c.sql", ::core::include_str!("c.sql")))
            .warn_repeats(10)
            .keep(true)
            .template("base"),
            |_| works(),
        };
        let text = expanded(arguments, &function).expect("the arguments are valid");
        assert!(text.contains(&calls.to_string()), "{text}");
        for (given, isolation) in [
            (quote!(chosen()), quote!(.isolation(chosen()))),
            (quote!(CHOSEN), quote!(.isolation(CHOSEN))),
            (quote!(my::Schema), quote!(.isolation(my::Schema))),
        ] {
            let text = expanded(quote!(DB, isolation = #given), &function).expect("the arguments are valid");
            assert!(text.contains(&isolation.to_string()), "{text}");
        }
    }

    #[test]
    fn expansion_reports_mistakes() {
        let plain: ItemFn = parse_quote!(
            fn works() {}
        );
        for (arguments, message) in [
            (quote!(), "needs a database object"),
            (quote!(keep = true), "comes first"),
            (quote!(fixtures("a.sql")), "comes first"),
            (quote!(DB, kept = true), "`kept` is not known here"),
            (quote!(DB, keep = true, keep = false), "`keep` is given twice"),
            (quote!(DB, keep), "`keep` has a value"),
            (quote!(DB, fixtures = "a.sql"), "in brackets"),
            (quote!(DB, fixture = [one, another]), "`fixture = one, fixture = another`"),
        ] {
            let said = expanded(arguments, &plain).expect_err("the input is a mistake");
            assert!(said.contains(message), "{said}");
        }
        let functions: [(ItemFn, &str); 9] = [
            (
                parse_quote!(
                    fn works(app: &App<C>) {}
                ),
                "by value",
            ),
            (
                parse_quote!(
                    async fn works() {}
                ),
                "drop `async`",
            ),
            (
                parse_quote!(
                    fn works(&self) {}
                ),
                "no `self`",
            ),
            (
                parse_quote!(
                    fn works<T>(app: T) {}
                ),
                "generic",
            ),
            (
                parse_quote!(
                    fn works(app: A, other: B) {}
                ),
                "one parameter",
            ),
            (
                parse_quote!(
                    #[test]
                    fn works() {}
                ),
                "drop the other `test`",
            ),
            (
                parse_quote!(
                    #[core::prelude::v1::test]
                    fn works() {}
                ),
                "drop the other `test`",
            ),
            (
                parse_quote!(
                    unsafe fn works() {}
                ),
                "plain function",
            ),
            (
                parse_quote!(
                    const fn works() {}
                ),
                "drop `const`",
            ),
        ];
        for (function, message) in functions {
            let said = expanded(quote!(DB), &function).expect_err("the input is a mistake");
            assert!(said.contains(message), "{said}");
        }
    }
}
