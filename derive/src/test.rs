//! `#[diesel_session::test]`: a test function as a body that is given an application.

use proc_macro2::TokenStream;
use quote::{ToTokens, quote};
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{Attribute, Error, Expr, Ident, ItemFn, LitStr, Path, Result, Token};

/// What stands in the parentheses.
struct Arguments {
    database: Expr,
    /// Calls on the setup.
    choices: Vec<TokenStream>,
}

const WORDS: &str =
    "`isolation = ..`, `max_size = ..`, `fixtures(\"..\", ..)`, `fixture = ..`, `config = ..`, `warn_repeats = ..` and `keep = ..`";

impl Parse for Arguments {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let begins_with_word = input.peek(Ident::peek_any) && (input.peek2(Token![=]) || input.peek2(syn::token::Paren));
        if input.is_empty() || begins_with_word {
            return Err(Error::new(
                input.span(),
                "the database object comes first: `#[diesel_session::test(DB)]`, and after it what the test asks for",
            ));
        }
        let mut arguments = Self { database: input.parse()?, choices: Vec::new() };
        let mut seen: Vec<Ident> = Vec::new();
        while !input.is_empty() {
            input.parse::<Token![,]>()?;
            if input.is_empty() {
                break;
            }
            let word: Ident = input.call(Ident::parse_any)?;
            let repeats = word == "fixture" || word == "fixtures";
            if !repeats && seen.contains(&word) {
                return Err(Error::new(word.span(), format!("`{word}` is there twice")));
            }
            arguments.choose(&word, input)?;
            seen.push(word);
        }
        Ok(arguments)
    }
}

impl Arguments {
    fn choose(&mut self, word: &Ident, input: ParseStream<'_>) -> Result<()> {
        let testing = quote!(::diesel_session::testing);
        if word == "fixtures" {
            let content;
            syn::parenthesized!(content in input);
            for file in Punctuated::<LitStr, Token![,]>::parse_terminated(&content)? {
                self.choices.push(quote!(.fixture(#testing::Fixture::sql(#file, ::core::include_str!(#file)))));
            }
            return Ok(());
        }
        let known = ["isolation", "max_size", "fixture", "config", "warn_repeats", "keep"];
        if !known.iter().any(|known| word == known) {
            return Err(Error::new(word.span(), format!("`{word}` is not known here; there are {WORDS}")));
        }
        input.parse::<Token![=]>()?;
        let value: Expr = input.parse()?;
        self.choices.push(match word.to_string().as_str() {
            "fixture" => {
                let name = value.to_token_stream().to_string();
                quote!(.fixture(#testing::Fixture::function(#name, #value)))
            }
            "isolation" => match isolation(&value) {
                Some(isolation) => quote!(.isolation(#testing::TestIsolation::#isolation)),
                None => quote!(.isolation(#value)),
            },
            _ => quote!(.#word(#value)),
        });
        Ok(())
    }
}

/// The name of an isolation that stands for itself.
fn isolation(value: &Expr) -> Option<&Ident> {
    let Expr::Path(path) = value else { return None };
    let ident = path.path.get_ident()?;
    ["Database", "Schema", "Rollback"].iter().any(|known| ident == known).then_some(ident)
}

pub(crate) fn expand(arguments: TokenStream, function: TokenStream) -> Result<TokenStream> {
    let Arguments { database, choices } = syn::parse2(arguments)?;
    let mut function: ItemFn = syn::parse2(function)?;
    let signature = &function.sig;
    let refuse = |what: &dyn ToTokens, reason: &str| Err(Error::new_spanned(what, reason));
    if let Some(asyncness) = &signature.asyncness {
        return refuse(asyncness, "a test of a synchronous program is no `async fn`");
    }
    if !signature.generics.params.is_empty() {
        return refuse(&signature.generics, "a test has no generic parameters");
    }
    if signature.inputs.len() > 1 {
        return refuse(&signature.inputs, "a test takes one argument, `app: App<..>`, or none");
    }
    if let Some(test) = function.attrs.iter().find(|attribute| is_test(attribute)) {
        return refuse(test, "`#[diesel_session::test]` makes it a test already; leave this one out");
    }
    let name = signature.ident.clone();
    let output = signature.output.clone();
    let attributes = std::mem::take(&mut function.attrs);
    let visibility = std::mem::replace(&mut function.vis, syn::Visibility::Inherited);
    let call = if signature.inputs.is_empty() { quote!(|_| body()) } else { quote!(body) };
    function.sig.ident = Ident::new("body", name.span());
    Ok(quote! {
        #[::core::prelude::v1::test]
        #(#attributes)*
        #visibility fn #name() #output {
            #function
            ::diesel_session::testing::run(
                ::diesel_session::testing::TestSetup::of(&#database)
                    .named(::core::concat!(::core::module_path!(), "::", ::core::stringify!(#name)))
                    #(#choices)*,
                #call,
            )
        }
    })
}

fn is_test(attribute: &Attribute) -> bool {
    let path: &Path = attribute.path();
    path.is_ident("test")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(arguments: TokenStream, function: TokenStream) -> String {
        match expand(arguments, function) {
            Ok(tokens) => tokens.to_string(),
            Err(error) => format!("error: {error}"),
        }
    }

    #[test]
    fn what_is_asked_for_becomes_a_setup() {
        let text = expanded(
            quote!(crate::DB, isolation = Rollback, max_size = 2, fixtures("a.sql", "b.sql"), fixture = two::users,),
            quote!(#[should_panic] pub fn works(app: App<C>) -> Result<()> { Ok(()) }),
        );
        for part in [
            "# [should_panic] pub fn works () -> Result < () >",
            "of (& crate :: DB)",
            "TestIsolation :: Rollback",
            ". max_size (2)",
            "include_str ! (\"b.sql\")",
            "Fixture :: function (\"two :: users\" , two :: users)",
            "fn body (app : App < C >)",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(expanded(quote!(DB, isolation = chosen()), quote!(fn f() {})).contains(". isolation (chosen ())"));
    }

    #[test]
    fn what_cannot_be_is_said() {
        for (arguments, function, part) in [
            (quote!(), quote!(fn f() {}), "comes first"),
            (quote!(isolation = Rollback), quote!(fn f() {}), "comes first"),
            (quote!(DB, size = 2), quote!(fn f() {}), "`size` is not known here"),
            (quote!(DB, max_size = 2, max_size = 3), quote!(fn f() {}), "there twice"),
            (quote!(DB), quote!(async fn f() {}), "no `async fn`"),
            (quote!(DB), quote!(fn f(a: A, b: B) {}), "one argument"),
            (quote!(DB), quote!(fn f<T>() {}), "no generic parameters"),
            (quote!(DB), quote!(#[test] fn f() {}), "leave this one out"),
        ] {
            let text = expanded(arguments, function);
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
