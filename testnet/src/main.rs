//! Entry point of `krake-testnet`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
