"""The script that `mechlens app` gives to Streamlit."""

if __name__ == "__main__":  # the process of the live models imports this file, and needs no page
    from explorer import main

    main()
